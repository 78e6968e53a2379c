"""Networks on dense graphs: EGNN (equivariant) and GNN (the baseline)."""
