"""Training: ``Atoms`` → weights. The verb is ``ase_enf.train``, in ``loop.py``; ``config.py`` says what can be set."""
