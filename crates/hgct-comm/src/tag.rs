//! What a message is about: the key under which it is received.

use std::fmt;

/// The name of a message between two ranks. The pair (peer, tag) must be unused while a message
/// under it is under way; messages of one tag arrive in the order in which they were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    /// What is carried.
    pub kind: TagKind,
    /// First number: the stage instance or pipeline.
    pub a: u32,
    /// Second number: the micro-batch or slice.
    pub b: u32,
    /// The step, or the sequence number of a collective.
    pub step: u64,
}

impl Tag {
    /// A tag of its four parts.
    pub fn new(kind: TagKind, a: u32, b: u32, step: u64) -> Self {
        Self { kind, a, b, step }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}.{} of step {}", self.kind.name(), self.a, self.b, self.step)
    }
}

/// What a message carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TagKind {
    /// An edge from a stage to the next.
    Activation,
    /// The gradient of an edge, from a stage to the one before.
    ActivationGradient,
    /// Gradients of a slice, to its update owner.
    Gradient,
    /// New parameters of a slice, from its update owner.
    Parameter,
    /// Scalars of an all-reduce; `step` is its sequence number.
    Scalar,
    /// A barrier; `step` is its sequence number.
    Barrier,
    /// Anything else.
    User,
    /// Probes of a link measurement.
    Link,
}

impl TagKind {
    const ALL: [Self; 8] = [
        Self::Activation,
        Self::ActivationGradient,
        Self::Gradient,
        Self::Parameter,
        Self::Scalar,
        Self::Barrier,
        Self::User,
        Self::Link,
    ];

    /// The name used in errors and timelines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Activation => "activation",
            Self::ActivationGradient => "activation-gradient",
            Self::Gradient => "gradient",
            Self::Parameter => "parameter",
            Self::Scalar => "scalar",
            Self::Barrier => "barrier",
            Self::User => "user",
            Self::Link => "link",
        }
    }

    pub(crate) fn to_wire(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_wire(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for kind in TagKind::ALL {
            assert_eq!(TagKind::from_wire(kind.to_wire()), Some(kind));
        }
        assert_eq!(TagKind::from_wire(TagKind::ALL.len() as u8), None);
    }
}
