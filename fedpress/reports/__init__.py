"""Shows the results of a run, from the files in its folder: a table and one offline HTML page."""
