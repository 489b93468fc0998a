"""What is asked of a model beside its training loss."""
