"""Tables and figures: pure functions of records and of the paper's reported figures."""
