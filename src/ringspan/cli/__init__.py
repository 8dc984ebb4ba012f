"""Thin commands over plain functions: `ringspan train`, `ringspan verify`, `ringspan show`, `ringspan doctor`."""
