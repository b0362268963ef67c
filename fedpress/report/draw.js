"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { responsive: true, displayModeBar: false, scrollZoom: false };

  // A colour like "--blue" is a variable of the page, so that plots follow the theme (and paper).
  const themed = (value, css) => {
    if (Array.isArray(value)) return value.map((item) => themed(item, css));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) =>
        key === "color" && String(item).startsWith("--") ? [key, css.getPropertyValue(item).trim()] : [key, themed(item, css)]));
  };

  const merged = (base, more) => ({ ...base, ...more });

  const draw = () => {
    const css = getComputedStyle(document.documentElement);
    const color = (name) => css.getPropertyValue(name).trim();
    const axis = {
      gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true,
      fixedrange: true, nticks: 6, title: { font: { size: 12, color: color("--muted") }, standoff: 8 },
    };
    const base = {
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "x unified", dragmode: false,
      font: { family: css.fontFamily, size: 12, color: color("--text") }, margin: { l: 8, r: 12, t: 10, b: 8 },
      hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--text") } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", traceorder: "normal", font: { color: color("--muted") } },
    };
    figures.forEach((figure, index) => {
      const spec = themed(figure.spec, css);
      const layout = merged(base, spec.layout);
      for (const key of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
        const own = spec.layout[key];
        layout[key] = { ...axis, ...own, title: merged(axis.title, own.title) };
      }
      Plotly.react(`plot-${index}`, spec.data, { ...layout, height: figure.height, margin: { ...base.margin, t: layout.annotations ? 28 : 10 } }, config);
    });
  };

  draw();
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
})();
