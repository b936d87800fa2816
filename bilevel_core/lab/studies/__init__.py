"""One file a study, named by what it asks; its resumable pieces, its protocol, and what its result must say."""
