"""A second language, walked through: Mandarin for pocket. docs/new-language.md has the steps."""
