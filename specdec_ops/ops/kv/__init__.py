"""K and V of rows that left early."""
