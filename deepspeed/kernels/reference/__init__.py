"""Plain torch implementations: what runs where nothing faster does, and what every other implementation must equal."""
