//! The PyO3 extension under python/hgct
