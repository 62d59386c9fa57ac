"""Jobs that people do with features: find, group, sort out, choose, compare."""
