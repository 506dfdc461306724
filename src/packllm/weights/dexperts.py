def solve(problem, options):
    raise NotImplementedError


solve_map = solve
