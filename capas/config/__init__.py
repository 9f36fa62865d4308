"""What is asked for, before a stage runs: schema, rules, composition, overrides, pins, cost."""
