"""Recurrences x[t+1] = f(x[t], u[t]) as systems of equations, solved in parallel by fixed-point iteration."""
