"""The papers: experiments that measure what a paper claims, and say whether it holds.

``python -m experiments`` lists them. Nothing is imported here, so that listing stays quick.
"""
