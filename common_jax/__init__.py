"""Arrays, meshes, loops, files: what both systems stand on. Knows no model."""
