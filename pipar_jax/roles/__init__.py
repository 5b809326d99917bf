"""What the roles of a run say to each other, and what each of them believes."""
