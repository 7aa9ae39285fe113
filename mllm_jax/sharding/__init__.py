"""The mesh and the table of logical-axis rules."""
