"""Models for programs without this library: one task as a plain T5, or all tasks as a graph."""
