"""Named models, which are presets of the parts, and the module that joins the parts."""
