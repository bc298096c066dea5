"""Commands beside training: compare, theory, plan, export."""
