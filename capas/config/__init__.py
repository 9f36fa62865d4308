"""Read the configuration before a stage runs: schema, rules, composition, overrides, pins, cost."""
