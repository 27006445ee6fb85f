"""Peers are other projects' ways to choose types and experts, rebuilt from their code or papers, to be measured beside our plans."""
