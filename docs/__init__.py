"""Pages about attncc; `docs.vocabulary` writes the one that lists what a spec may say."""
