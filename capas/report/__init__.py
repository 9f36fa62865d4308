"""The HTML pages in reports/: numbers, words, plots and templates."""
