"""Front end, program, rules, cost, planning, proof, report and command line."""
