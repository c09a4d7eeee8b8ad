"""Results: from saved logits to metrics, intervals, a recommendation, tables and the report."""
