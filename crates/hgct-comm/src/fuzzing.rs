//! What a stranger's bytes reach first, for tests with random ones. No part of the interface.

use hgct_core::ids::{Generation, Rank, RunId};

use crate::handshake::{Handshake, Identity, Offer, Progress};
use crate::key::run_digest;
use crate::wire::{FrameKind, HEADER_BYTES, Header};
use crate::{RunKey, Tag, TagKind};

fn identity(me: u32) -> Identity {
    let run = RunId::new("fuzz").map(|run| run_digest(&run)).unwrap_or_default();
    Identity {
        me: Rank(me),
        members: vec![Rank(0), Rank(1)],
        generation: Generation::default(),
        run,
        key: RunKey([3; 32]),
    }
}

/// Gives bytes to one side of a fresh handshake, as a connection would; whether nothing of them was
/// refused.
pub fn handshake(bytes: &[u8], dials: bool) -> bool {
    let mut side = if dials {
        Handshake::dial(identity(1), Rank(0), [1; 32])
    } else {
        Handshake::accept(identity(0), [2; 32])
    };
    let mut rest = bytes;
    while !rest.is_empty() {
        side.output().clear();
        let wanted = side.wanted();
        if wanted == 0 {
            return true;
        }
        let (now, later) = rest.split_at(wanted.min(rest.len()));
        rest = later;
        match side.receive(now) {
            Ok(Progress::Wait) => {}
            Ok(Progress::MayOffer(_)) => side.offer(Offer::NONE),
            Ok(Progress::Offered(..)) => side.answer(false),
            Ok(Progress::Done(..)) => return true,
            Err(_) => return false,
        }
    }
    true
}

/// What the two sides of a good handshake say: the dialer's bytes, the acceptor's bytes.
pub fn good_handshake() -> (Vec<u8>, Vec<u8>) {
    let mut dialer = Handshake::dial(identity(1), Rank(0), [1; 32]);
    let mut acceptor = Handshake::accept(identity(0), [2; 32]);
    let (mut said, mut answered) = (Vec::new(), Vec::new());
    loop {
        let output = std::mem::take(dialer.output());
        said.extend_from_slice(&output);
        if let Ok(Progress::Offered(..)) = feed(&mut acceptor, &output) {
            acceptor.answer(false);
        }
        let output = std::mem::take(acceptor.output());
        answered.extend_from_slice(&output);
        match feed(&mut dialer, &output) {
            Ok(Progress::MayOffer(_)) => dialer.offer(Offer::NONE),
            Ok(Progress::Wait) => {}
            _ => return (said, answered),
        }
    }
}

fn feed(side: &mut Handshake, mut bytes: &[u8]) -> Result<Progress, crate::handshake::Failure> {
    let mut progress = Progress::Wait;
    while !bytes.is_empty() {
        let (now, later) = bytes.split_at(side.wanted().clamp(1, bytes.len()));
        progress = side.receive(now)?;
        bytes = later;
    }
    Ok(progress)
}

/// Reads the header of a data frame; whether it is one.
pub fn data_frame(bytes: &[u8]) -> bool {
    bytes.first_chunk::<HEADER_BYTES>().is_some_and(|bytes| {
        Header::decode(bytes).is_ok_and(|header| {
            // What was understood is said the same way.
            assert_eq!(Header::decode(&header.encode()).as_ref(), Ok(&header));
            true
        })
    })
}

/// A good header of a data frame.
pub fn good_data_frame() -> Vec<u8> {
    let header = Header {
        kind: FrameKind::Data,
        tag: Tag::new(TagKind::Activation, 1, 2, 3),
        run: 7,
        generation: Generation::default(),
        sequence: 4,
        bytes: 4096,
        queued_ns: 5,
    };
    header.encode().to_vec()
}
