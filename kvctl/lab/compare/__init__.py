"""Two sides played in turn and judged: settings, versions, systems."""
