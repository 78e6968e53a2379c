"""From a molecule and a calculator to free energies: a thermal ensemble, a flow of it, and the flow reweighted."""
