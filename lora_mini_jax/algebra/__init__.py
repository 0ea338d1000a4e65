"""Thin matrices: how they are drawn, made from data, multiplied and decomposed."""
