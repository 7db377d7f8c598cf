//! Collective programs as data: who sends which byte range to whom
