//! The hgct command.

fn main() {}
