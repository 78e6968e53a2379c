"""From a molecule and a calculator to free energies: a thermal ensemble, a flow trained on it, and reweighted draws."""
