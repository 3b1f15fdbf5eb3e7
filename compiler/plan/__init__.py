"""Choosing where everything runs: rules x mesh x cost -> a plan with its reasons and its certificate."""
