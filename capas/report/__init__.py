"""Write the HTML pages in reports/: numbers, texts, plots and templates."""
