//! The one error type of this crate.

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with a name, a document or a request, with where it was found.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
#[non_exhaustive]
pub enum Error {
    /// A name has a character that names may not have.
    #[error("{what} {found:?} is not a name: use {allowed}")]
    Name {
        /// What the name names.
        what: &'static str,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A value has its place in the types, but nothing executes it yet.
    #[error("{what} {value} is not supported yet: use {instead}")]
    NotYet {
        /// What was asked for.
        what: &'static str,
        /// The value that is not there yet.
        value: String,
        /// What works today.
        instead: &'static str,
    },
    /// A document has a key that it may not have.
    #[error("{file}: unknown key `{key}`{}{}", suggestion.as_ref().map(|s| format!(": did you mean `{s}`?")).unwrap_or_default(), if allowed.is_empty() { String::new() } else { format!(" (allowed: {allowed})") })]
    UnknownKey {
        /// The file.
        file: String,
        /// The key with its path, such as `recipe.stpes`.
        key: String,
        /// The nearest allowed key, if one is near.
        suggestion: Option<String>,
        /// All allowed keys.
        allowed: String,
    },
    /// A document does not parse.
    #[error("{file}{}: {message}", line.map(|l| format!(", line {l}")).unwrap_or_default())]
    Syntax {
        /// The file.
        file: String,
        /// Line, from 1, where known.
        line: Option<usize>,
        /// What the parser said.
        message: String,
    },
    /// A key has a value that it may not have.
    #[error("{file}: `{key}` is {found}, but must be {allowed}")]
    Value {
        /// The file or document.
        file: String,
        /// The key with its path.
        key: String,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: String,
    },
    /// A plan or schedule breaks one of its invariants.
    #[error("plan: {invariant}: {found}")]
    Plan {
        /// The invariant, by its name in `ARCHITECTURE.md`.
        invariant: &'static str,
        /// What was found.
        found: String,
    },
}
