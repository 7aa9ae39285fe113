"""Sources, processors, templates, the packing plan and batches."""
