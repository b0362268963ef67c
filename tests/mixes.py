"""Eight ways of an update home, each a list of overrides of a recipe whose federate stage is number 2."""

PLAIN = ["stage.2.privacy=none"]
CLIENT = 'stage.2.privacy={ unit = "client", epsilon = 8.0, delta = 1e-3, clip_norm = 1.0%s }'
SAMPLE = 'stage.2.privacy={ unit = "sample", epsilon = 8.0, delta = 1e-3, clip_norm = 1.0%s }'
GRID = 'stage.2.uplink=[{ kind = "clip", clip_norm = 1.0 }, { kind = "rotate" }, { kind = "discretize", bits = 16 }]'

MIXES = {
    "nothing": PLAIN,
    "int8": [*PLAIN, 'stage.2.uplink=[{ kind = "quantize", bits = 8 }]'],
    "top-k and ANS both ways": [
        *PLAIN,
        'stage.2.uplink=[{ kind = "topk", density = 0.1 }, { kind = "quantize", bits = 4 }]',
        'stage.2.downlink=[{ kind = "topk", density = 0.1 }, { kind = "quantize", bits = 4 }]',
        "stage.2.error_feedback=true",
    ],
    "secure sum": [*PLAIN, GRID, 'stage.2.aggregator="secure"'],
    "secure sum with Skellam noise": [
        CLIENT % ', trust = "distributed"',
        'stage.2.uplink=[{ kind = "rotate" }, { kind = "discretize", bits = 18 }]',
    ],
    "client privacy with int8": [CLIENT % "", 'stage.2.uplink=[{ kind = "quantize", bits = 8 }]'],
    "sample privacy with top-k": [SAMPLE % "", 'stage.2.uplink=[{ kind = "topk", density = 0.2 }]'],
    "adaptive clip": [CLIENT % ", adaptive = { initial = 0.1 }"],
}
