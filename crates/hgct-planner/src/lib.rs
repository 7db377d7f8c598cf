//! Cost model, simulation, search, bounds and the plan linter
