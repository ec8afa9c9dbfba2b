"""Tables, figures and the page, built from records alone, without torch."""
