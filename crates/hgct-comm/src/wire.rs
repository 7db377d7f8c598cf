//! The frame that carries one message: a header of 64 bytes, then the payload.
//!
//! | Bytes | Field |
//! | --- | --- |
//! | 0–1 | protocol version |
//! | 2 | frame kind |
//! | 3 | tag kind |
//! | 4–7, 8–11 | tag `a`, `b` |
//! | 12–15 | first four bytes of the run id's digest |
//! | 16–23 | tag `step` |
//! | 24–31, 32–39 | generation: epoch, sequence |
//! | 40–47 | sequence number of the frame on its connection, from 0 |
//! | 48–55 | payload bytes, at most [`MAX_MESSAGE_BYTES`] |
//! | 56–63 | when the sender queued it, in the sender's monotonic nanoseconds |
//!
//! All numbers are little-endian. A header that differs from what the connection agreed on in its
//! handshake ends the connection.

use hgct_core::ids::Generation;

use crate::tag::{Tag, TagKind};

/// Version of handshake and frames. Another version is refused with both numbers.
pub const PROTOCOL_VERSION: u16 = 1;

/// Largest payload of one message.
pub const MAX_MESSAGE_BYTES: u64 = 1 << 30;

/// Bytes of a frame's header.
pub(crate) const HEADER_BYTES: usize = 64;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameKind {
    /// A message for the mailbox.
    Data,
    /// The last frame of a peer that leaves in order.
    Goodbye,
    /// Asks for a pong with the same tag.
    Ping,
    /// Answers a ping.
    Pong,
    /// A payload to throw away: it only measures the link.
    Discard,
}

impl FrameKind {
    const ALL: [Self; 5] = [Self::Data, Self::Goodbye, Self::Ping, Self::Pong, Self::Discard];
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame is for.
    pub kind: FrameKind,
    /// What the message is about.
    pub tag: Tag,
    /// First four bytes of the run id's digest.
    pub run: u32,
    /// Generation of the communicator.
    pub generation: Generation,
    /// Number of the frame on its connection.
    pub sequence: u64,
    /// Bytes of the payload.
    pub bytes: u64,
    /// When the sender queued it, in the sender's monotonic nanoseconds.
    pub queued_ns: u64,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..2].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        out[2] = self.kind as u8;
        out[3] = self.tag.kind.to_wire();
        out[4..8].copy_from_slice(&self.tag.a.to_le_bytes());
        out[8..12].copy_from_slice(&self.tag.b.to_le_bytes());
        out[12..16].copy_from_slice(&self.run.to_le_bytes());
        out[16..24].copy_from_slice(&self.tag.step.to_le_bytes());
        out[24..32].copy_from_slice(&self.generation.epoch.to_le_bytes());
        out[32..40].copy_from_slice(&self.generation.sequence.to_le_bytes());
        out[40..48].copy_from_slice(&self.sequence.to_le_bytes());
        out[48..56].copy_from_slice(&self.bytes.to_le_bytes());
        out[56..64].copy_from_slice(&self.queued_ns.to_le_bytes());
        out
    }

    /// Reads a header; says in words what is wrong with a bad one.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, String> {
        let version = u16::from_le_bytes([bytes[0], bytes[1]]);
        if version != PROTOCOL_VERSION {
            return Err(format!(
                "a frame of protocol version {version}, this side speaks {PROTOCOL_VERSION}"
            ));
        }
        let kind = *FrameKind::ALL
            .get(usize::from(bytes[2]))
            .ok_or_else(|| format!("a frame of unknown kind {}", bytes[2]))?;
        let tag_kind = TagKind::from_wire(bytes[3])
            .ok_or_else(|| format!("a message of unknown tag kind {}", bytes[3]))?;
        let payload = u64_at(bytes, 48);
        if payload > MAX_MESSAGE_BYTES {
            return Err(format!("a message of {payload} bytes, allowed are {MAX_MESSAGE_BYTES}"));
        }
        Ok(Self {
            kind,
            tag: Tag::new(tag_kind, u32_at(bytes, 4), u32_at(bytes, 8), u64_at(bytes, 16)),
            run: u32_at(bytes, 12),
            generation: Generation { epoch: u64_at(bytes, 24), sequence: u64_at(bytes, 32) },
            sequence: u64_at(bytes, 40),
            bytes: payload,
            queued_ns: u64_at(bytes, 56),
        })
    }
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> impl Strategy<Value = Header> {
        let tag = (0u8..8, any::<u32>(), any::<u32>(), any::<u64>());
        let rest = (any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
        (0usize..5, tag, rest, 0..=MAX_MESSAGE_BYTES).prop_map(|(kind, tag, rest, bytes)| Header {
            kind: FrameKind::ALL[kind],
            tag: Tag::new(TagKind::from_wire(tag.0).unwrap(), tag.1, tag.2, tag.3),
            run: rest.0,
            generation: Generation { epoch: rest.1, sequence: rest.2 },
            sequence: rest.3,
            bytes,
            queued_ns: rest.4,
        })
    }

    proptest! {
        #[test]
        fn a_header_survives_the_wire(header in header()) {
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_never_exceed_the_bound(bytes in any::<[u8; 32]>(), more in any::<[u8; 32]>(), versioned in any::<bool>()) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            if versioned {
                all[..4].copy_from_slice(&[1, 0, bytes[2] % 8, bytes[3] % 10]);
            }
            if let Ok(header) = Header::decode(&all) {
                prop_assert!(header.bytes <= MAX_MESSAGE_BYTES);
            }
        }
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = 9;
        let message = Header::decode(&bytes).unwrap_err();
        assert!(message.contains('9') && message.contains('1'), "{message}");
    }
}
