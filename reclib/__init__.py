"""BERT4Rec at scale: exact and fast training, honest measurement, records that figures are built from.

Importing this package does no work and imports nothing heavy; import the module that you need.
"""
