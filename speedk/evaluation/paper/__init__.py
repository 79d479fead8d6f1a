"""The paper's tables: what was published, what makes it here, what was measured."""
