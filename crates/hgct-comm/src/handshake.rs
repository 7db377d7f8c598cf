//! Who may speak: mutual challenge and response over a fresh connection. Sans-IO.
//!
//! ```text
//! dialer                                                acceptor
//!   hello      nonce, both ranks, generation, run   ──►
//!              ◄──                          nonce   challenge
//!   proof      HMAC(dialer, hello, nonce)           ──►           (checked before anything else)
//!              ◄──   HMAC(acceptor, hello, nonce)   welcome
//!   offer      shared memory, or none               ──►
//!              ◄──                  taken or not   answer
//! ```
//!
//! - Both nonces are fresh, so an old recording proves nothing; the role stands in the proof, so it
//!   cannot be reflected; ranks, generation, run and version stand in it, so it fits no other
//!   connection.
//! - A frame has a prefix of 12 bytes (`hgct`, version, kind, zero, length). Its length must be the
//!   one of its kind, at most [`MAX_FRAME_BYTES`]; nothing else is read before the proof.
//! - The acceptor proves itself only to a dialer that has proved itself.
//! - A refusal says why: to a stranger only "version" or "key".

use hgct_core::ids::{Generation, Rank};

use crate::error::Refusal;
use crate::key::RunKey;
use crate::wire::{PROTOCOL_VERSION, u32_at, u64_at};

const MAGIC: [u8; 4] = *b"hgct";
const PREFIX_BYTES: usize = 12;
/// Largest body of a handshake frame.
pub(crate) const MAX_FRAME_BYTES: usize = 128;
const LABEL: &[u8; 16] = b"hgct data proof\0";

const HELLO: u8 = 1;
const CHALLENGE: u8 = 2;
const PROOF: u8 = 3;
const WELCOME: u8 = 4;
const REFUSE: u8 = 5;
const OFFER: u8 = 6;
const ANSWER: u8 = 7;

const fn body_bytes(kind: u8) -> Option<usize> {
    match kind {
        HELLO => Some(88),
        CHALLENGE | PROOF | WELCOME => Some(32),
        REFUSE => Some(24),
        OFFER => Some(48),
        ANSWER => Some(4),
        _ => None,
    }
}

/// What both sides must agree on.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) me: Rank,
    pub(crate) members: Vec<Rank>,
    pub(crate) generation: Generation,
    pub(crate) run: [u8; 32],
    pub(crate) key: RunKey,
}

/// Shared memory that the dialer offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    /// The process that holds it; 0 for no offer.
    pub(crate) process: u32,
    /// Its descriptor there.
    pub(crate) descriptor: u32,
    /// Bytes of one ring.
    pub(crate) ring_bytes: u64,
    /// What stands at its beginning, so that no other file is taken for it.
    pub(crate) cookie: [u8; 32],
}

impl Offer {
    pub(crate) const NONE: Self = Self { process: 0, descriptor: 0, ring_bytes: 0, cookie: [0; 32] };
}

/// Why a handshake ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Not our protocol, or not in this order.
    Malformed(String),
    /// The other side speaks another version.
    Version(u16),
    /// The other side could not prove that it has the key.
    Key,
    /// The other side refused.
    Refused(Refusal),
    /// We refused an authenticated peer.
    Unfit(Refusal),
}

impl Failure {
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Malformed(found) => found.clone(),
            Self::Version(theirs) => {
                format!("protocol version {theirs}, this side speaks {PROTOCOL_VERSION}")
            }
            Self::Key => "it does not have the key of this run".into(),
            Self::Refused(refusal) => format!("it refused: {refusal}"),
            Self::Unfit(refusal) => format!("refused: {refusal}"),
        }
    }
}

/// What the owner must do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Bytes are wanted.
    Wait,
    /// The dialer is authenticated and may offer shared memory: call [`Handshake::offer`].
    MayOffer(Rank),
    /// The acceptor has an offer: call [`Handshake::answer`].
    Offered(Rank, Offer),
    /// Finished with this peer; the dialer hears whether its offer was taken.
    Done(Rank, bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Acceptor: waits for these frames.
    Hello,
    Proof,
    Offer,
    /// Dialer: waits for these frames.
    Challenge,
    Welcome,
    Answer,
    /// Waits for its owner, or has ended.
    Paused,
}

/// One side of one handshake.
#[derive(Debug)]
pub(crate) struct Handshake {
    identity: Identity,
    state: State,
    /// The nonce of this side.
    nonce: [u8; 32],
    /// Body of the hello, as sent or received.
    hello: Vec<u8>,
    /// Nonce of the acceptor.
    challenge: [u8; 32],
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Handshake {
    /// The side that made the connection, to `peer`.
    pub(crate) fn dial(identity: Identity, peer: Rank, nonce: [u8; 32]) -> Self {
        let mut hello = nonce.to_vec();
        hello.extend(identity.me.0.to_le_bytes());
        hello.extend(peer.0.to_le_bytes());
        hello.extend(identity.generation.epoch.to_le_bytes());
        hello.extend(identity.generation.sequence.to_le_bytes());
        hello.extend(identity.run);
        let mut this = Self::new(identity, nonce, State::Challenge);
        this.put(HELLO, &hello);
        this.hello = hello;
        this
    }

    /// The side that took the connection.
    pub(crate) fn accept(identity: Identity, nonce: [u8; 32]) -> Self {
        Self::new(identity, nonce, State::Hello)
    }

    fn new(identity: Identity, nonce: [u8; 32], state: State) -> Self {
        Self {
            identity,
            state,
            nonce,
            hello: Vec::new(),
            challenge: [0; 32],
            input: Vec::new(),
            output: Vec::new(),
        }
    }

    /// How many bytes to read now: never more than the current frame, so that what follows the
    /// handshake stays in the connection.
    pub(crate) fn wanted(&self) -> usize {
        if self.state == State::Paused {
            return 0;
        }
        if self.input.len() < PREFIX_BYTES {
            return PREFIX_BYTES - self.input.len();
        }
        let body = body_bytes(self.input[6]).unwrap_or(0);
        PREFIX_BYTES + body - self.input.len().min(PREFIX_BYTES + body)
    }

    /// Bytes to write.
    pub(crate) fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// Takes bytes that were read. After a failure the output may hold a refusal to send.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> Result<Progress, Failure> {
        self.input.extend_from_slice(bytes);
        let result = self.step();
        if let Err(failure) = &result {
            self.state = State::Paused;
            self.refuse(failure);
        }
        result
    }

    /// The dialer offers shared memory, or [`Offer::NONE`].
    pub(crate) fn offer(&mut self, offer: Offer) {
        let mut body = offer.process.to_le_bytes().to_vec();
        body.extend(offer.descriptor.to_le_bytes());
        body.extend(offer.ring_bytes.to_le_bytes());
        body.extend(offer.cookie);
        self.put(OFFER, &body);
        self.state = State::Answer;
    }

    /// The acceptor has taken the offer, or not, and is done.
    pub(crate) fn answer(&mut self, taken: bool) {
        self.put(ANSWER, &u32::from(taken).to_le_bytes());
    }

    fn step(&mut self) -> Result<Progress, Failure> {
        if self.input.len() < PREFIX_BYTES {
            return Ok(Progress::Wait);
        }
        let kind = self.check_prefix()?;
        if self.wanted() > 0 {
            return Ok(Progress::Wait);
        }
        let frame = std::mem::take(&mut self.input);
        let body = &frame[PREFIX_BYTES..];
        if kind == REFUSE && matches!(self.state, State::Challenge | State::Welcome | State::Answer) {
            return Err(Failure::Refused(read_refusal(body)));
        }
        match (self.state, kind) {
            (State::Hello, HELLO) => {
                self.hello = body.to_vec();
                self.challenge = self.nonce;
                let nonce = self.nonce;
                self.put(CHALLENGE, &nonce);
                self.state = State::Proof;
                Ok(Progress::Wait)
            }
            (State::Proof, PROOF) => self.check_dialer(body),
            (State::Offer, OFFER) => {
                self.state = State::Paused;
                let mut cookie = [0; 32];
                cookie.copy_from_slice(&body[16..48]);
                let offer = Offer {
                    process: u32_at(body, 0),
                    descriptor: u32_at(body, 4),
                    ring_bytes: u64_at(body, 8),
                    cookie,
                };
                Ok(Progress::Offered(self.dialer(), offer))
            }
            (State::Challenge, CHALLENGE) => {
                self.challenge.copy_from_slice(body);
                let proof = self.identity.key.proof(&self.transcript(b"dialer  "));
                self.put(PROOF, &proof);
                self.state = State::Welcome;
                Ok(Progress::Wait)
            }
            (State::Welcome, WELCOME) => {
                if !self.identity.key.verify(&self.transcript(b"acceptor"), body) {
                    return Err(Failure::Key);
                }
                self.state = State::Paused;
                Ok(Progress::MayOffer(self.acceptor()))
            }
            (State::Answer, ANSWER) => {
                self.state = State::Paused;
                Ok(Progress::Done(self.acceptor(), u32_at(body, 0) == 1))
            }
            (state, kind) => Err(Failure::Malformed(format!("frame kind {kind} in state {state:?}"))),
        }
    }

    /// Magic, version, kind and length, before anything else is looked at.
    fn check_prefix(&self) -> Result<u8, Failure> {
        let prefix = &self.input[..PREFIX_BYTES];
        if prefix[..4] != MAGIC {
            return Err(Failure::Malformed("bytes that are not this protocol".into()));
        }
        let version = u16::from_le_bytes([prefix[4], prefix[5]]);
        if version != PROTOCOL_VERSION {
            return Err(Failure::Version(version));
        }
        let kind = prefix[6];
        let length = u32_at(prefix, 8) as usize;
        if prefix[7] != 0 || body_bytes(kind) != Some(length) {
            return Err(Failure::Malformed(format!(
                "a handshake frame of kind {kind} with {length} bytes, at most {MAX_FRAME_BYTES} are allowed"
            )));
        }
        Ok(kind)
    }

    /// The dialer's proof first; only what is proved is then looked at.
    fn check_dialer(&mut self, proof: &[u8]) -> Result<Progress, Failure> {
        if !self.identity.key.verify(&self.transcript(b"dialer  "), proof) {
            return Err(Failure::Key);
        }
        let generation = Generation { epoch: u64_at(&self.hello, 40), sequence: u64_at(&self.hello, 48) };
        if self.hello[56..88] != self.identity.run {
            return Err(Failure::Unfit(Refusal::Run));
        }
        if generation != self.identity.generation {
            return Err(Failure::Unfit(Refusal::Generation { theirs: generation }));
        }
        let dialer = self.dialer();
        let fits = self.acceptor() == self.identity.me
            && dialer != self.identity.me
            && self.identity.members.contains(&dialer);
        if !fits {
            return Err(Failure::Unfit(Refusal::Rank));
        }
        let proof = self.identity.key.proof(&self.transcript(b"acceptor"));
        self.put(WELCOME, &proof);
        self.state = State::Offer;
        Ok(Progress::Wait)
    }

    fn transcript(&self, role: &'static [u8]) -> [&[u8]; 4] {
        [LABEL_WITH_VERSION.as_slice(), role, &self.hello, &self.challenge]
    }

    fn dialer(&self) -> Rank {
        Rank(u32_at(&self.hello, 32))
    }

    fn acceptor(&self) -> Rank {
        Rank(u32_at(&self.hello, 36))
    }

    fn put(&mut self, kind: u8, body: &[u8]) {
        self.output.extend(MAGIC);
        self.output.extend(PROTOCOL_VERSION.to_le_bytes());
        self.output.extend([kind, 0]);
        self.output.extend((body.len() as u32).to_le_bytes());
        self.output.extend(body);
    }

    /// Tells the other side why, as far as it may know: strangers hear nothing but version and key.
    fn refuse(&mut self, failure: &Failure) {
        let (code, generation) = match failure {
            Failure::Version(_) => (1u32, Generation::default()),
            Failure::Key => (2, Generation::default()),
            Failure::Unfit(Refusal::Generation { .. }) => (3, self.identity.generation),
            Failure::Unfit(Refusal::Run) => (4, Generation::default()),
            Failure::Unfit(_) => (5, Generation::default()),
            Failure::Malformed(_) | Failure::Refused(_) => return,
        };
        let mut body = code.to_le_bytes().to_vec();
        body.extend(u32::from(PROTOCOL_VERSION).to_le_bytes());
        body.extend(generation.epoch.to_le_bytes());
        body.extend(generation.sequence.to_le_bytes());
        self.put(REFUSE, &body);
    }
}

/// The label of all proofs, with the version both sides speak.
const LABEL_WITH_VERSION: [u8; 18] = {
    let mut label = [0; 18];
    let mut at = 0;
    while at < 16 {
        label[at] = LABEL[at];
        at += 1;
    }
    let version = PROTOCOL_VERSION.to_le_bytes();
    label[16] = version[0];
    label[17] = version[1];
    label
};

fn read_refusal(body: &[u8]) -> Refusal {
    match u32_at(body, 0) {
        1 => Refusal::Version { theirs: u32_at(body, 4) as u16 },
        2 => Refusal::Key,
        3 => {
            Refusal::Generation { theirs: Generation { epoch: u64_at(body, 8), sequence: u64_at(body, 16) } }
        }
        4 => Refusal::Run,
        _ => Refusal::Rank,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn identity(me: u32) -> Identity {
        Identity {
            me: Rank(me),
            members: vec![Rank(0), Rank(1), Rank(2)],
            generation: Generation { epoch: 2, sequence: 7 },
            run: [9; 32],
            key: RunKey([5; 32]),
        }
    }

    /// Lets two sides talk until both wait, with a hand on every frame; gives how each ended.
    fn talk(
        mut dialer: Handshake,
        mut acceptor: Handshake,
        mut hand: impl FnMut(usize, Vec<u8>) -> Vec<u8>,
    ) -> (Result<Progress, Failure>, Result<Progress, Failure>) {
        let mut ends = (Ok(Progress::Wait), Ok(Progress::Wait));
        for frame in 0..20 {
            let to_acceptor = !dialer.output().is_empty();
            let from = if to_acceptor { &mut dialer } else { &mut acceptor };
            let bytes = std::mem::take(from.output());
            if bytes.is_empty() {
                break;
            }
            let (side, end) =
                if to_acceptor { (&mut acceptor, &mut ends.1) } else { (&mut dialer, &mut ends.0) };
            match feed(side, &hand(frame, bytes)) {
                Ok(Progress::Wait) => {}
                Ok(Progress::MayOffer(_)) => side.offer(Offer::NONE),
                Ok(Progress::Offered(rank, _)) => {
                    side.answer(false);
                    *end = Ok(Progress::Done(rank, false));
                }
                other => *end = other,
            }
        }
        ends
    }

    /// Hands bytes over in the pieces that are asked for.
    fn feed(side: &mut Handshake, mut bytes: &[u8]) -> Result<Progress, Failure> {
        let mut last = Ok(Progress::Wait);
        while !bytes.is_empty() && side.wanted() > 0 {
            let (now, later) = bytes.split_at(side.wanted().min(bytes.len()));
            bytes = later;
            last = side.receive(now);
            if !matches!(last, Ok(Progress::Wait)) {
                break;
            }
        }
        last
    }

    fn pair(dialer: Identity, acceptor: Identity) -> (Handshake, Handshake) {
        (Handshake::dial(dialer, Rank(0), [1; 32]), Handshake::accept(acceptor, [2; 32]))
    }

    fn untouched(_: usize, bytes: Vec<u8>) -> Vec<u8> {
        bytes
    }

    #[test]
    fn both_sides_learn_who_the_other_is() {
        let (dialer, acceptor) = pair(identity(2), identity(0));
        let ends = talk(dialer, acceptor, untouched);
        assert_eq!(ends.0, Ok(Progress::Done(Rank(0), false)));
        assert_eq!(ends.1, Ok(Progress::Done(Rank(2), false)));
    }

    #[test]
    fn another_key_run_generation_or_rank_is_refused_for_its_reason() {
        let refused = |change: &dyn Fn(&mut Identity)| {
            let mut other = identity(2);
            change(&mut other);
            let (dialer, acceptor) = pair(other, identity(0));
            talk(dialer, acceptor, untouched).0.unwrap_err()
        };
        assert_eq!(refused(&|who| who.key = RunKey([6; 32])), Failure::Refused(Refusal::Key));
        assert_eq!(refused(&|who| who.run = [1; 32]), Failure::Refused(Refusal::Run));
        let theirs = identity(0).generation;
        let older = Generation { epoch: 2, sequence: 6 };
        assert_eq!(refused(&|who| who.generation = older), Failure::Refused(Refusal::Generation { theirs }));
        assert_eq!(refused(&|who| who.me = Rank(9)), Failure::Refused(Refusal::Rank));
        assert_eq!(refused(&|who| who.me = Rank(0)), Failure::Refused(Refusal::Rank));
        let (dialer, acceptor) = pair(identity(2), identity(1));
        assert!(talk(dialer, acceptor, untouched).0.is_err(), "meant for rank 0, taken by rank 1");
    }

    #[test]
    fn an_acceptor_without_the_key_learns_nothing_it_could_use() {
        // It takes any proof, and sends a welcome made with its own key.
        let mut imposter = identity(0);
        imposter.key = RunKey([6; 32]);
        let mut dialer = Handshake::dial(identity(2), Rank(0), [1; 32]);
        let hello = std::mem::take(dialer.output());
        let mut fake = Handshake::accept(imposter, [2; 32]);
        fake.hello = hello[PREFIX_BYTES..].to_vec();
        fake.challenge = [2; 32];
        fake.put(CHALLENGE, &[2; 32]);
        assert_eq!(feed(&mut dialer, &std::mem::take(fake.output())), Ok(Progress::Wait));
        let proof = std::mem::take(dialer.output());
        let mut reflected = proof.clone();
        reflected[6] = WELCOME;
        let welcome = fake.identity.key.proof(&fake.transcript(b"acceptor"));
        fake.put(WELCOME, &welcome);
        for answer in [reflected, std::mem::take(fake.output())] {
            let mut dialer = Handshake::dial(identity(2), Rank(0), [1; 32]);
            dialer.challenge = [2; 32];
            dialer.state = State::Welcome;
            assert_eq!(feed(&mut dialer, &answer), Err(Failure::Key));
        }
    }

    #[test]
    fn a_recording_proves_nothing() {
        let mut recorded = Vec::new();
        let (dialer, acceptor) = pair(identity(2), identity(0));
        let ends = talk(dialer, acceptor, |frame, bytes| {
            if frame % 2 == 0 {
                recorded.push(bytes.clone());
            }
            bytes
        });
        assert!(ends.1.is_ok() && recorded.len() == 3);
        let mut fresh = Handshake::accept(identity(0), [3; 32]);
        assert_eq!(feed(&mut fresh, &recorded[0]), Ok(Progress::Wait));
        assert_eq!(feed(&mut fresh, &recorded[1]), Err(Failure::Key));
    }

    #[test]
    fn other_versions_are_refused_with_both_numbers() {
        let mut acceptor = Handshake::accept(identity(0), [2; 32]);
        let mut hello = std::mem::take(Handshake::dial(identity(2), Rank(0), [1; 32]).output());
        hello[4] = 77;
        let failure = feed(&mut acceptor, &hello).unwrap_err();
        assert_eq!(failure, Failure::Version(77));
        assert!(failure.text().contains("77") && failure.text().contains('1'));
        let refusal = std::mem::take(acceptor.output());
        let mut dialer = Handshake::dial(identity(2), Rank(0), [1; 32]);
        let failure = feed(&mut dialer, &refusal).unwrap_err();
        assert_eq!(failure, Failure::Refused(Refusal::Version { theirs: PROTOCOL_VERSION }));
    }

    #[test]
    fn a_length_is_refused_before_its_bytes_are_read() {
        let mut acceptor = Handshake::accept(identity(0), [2; 32]);
        let mut prefix = std::mem::take(Handshake::dial(identity(2), Rank(0), [1; 32]).output());
        prefix.truncate(PREFIX_BYTES);
        prefix[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(feed(&mut acceptor, &prefix), Err(Failure::Malformed(_))));
        assert_eq!(acceptor.wanted(), 0);
        assert!(acceptor.output().is_empty(), "a stranger hears nothing");
    }

    proptest! {
        #[test]
        fn a_changed_bit_never_authenticates(frame in 0usize..4, at in 0usize..100, bit in 0u8..8) {
            let (dialer, acceptor) = pair(identity(2), identity(0));
            let mut changed = false;
            let ends = talk(dialer, acceptor, |number, mut bytes| {
                if number == frame && at < bytes.len() {
                    bytes[at] ^= 1 << bit;
                    changed = true;
                }
                bytes
            });
            let done = |end: &Result<Progress, Failure>| matches!(end, Ok(Progress::Done(..)));
            prop_assert_eq!(done(&ends.0) && done(&ends.1), !changed, "{:?}", ends);
        }

        #[test]
        fn garbage_never_panics_or_passes(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            magic in any::<bool>(),
            dialled in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if magic && bytes.len() >= PREFIX_BYTES {
                let kind = 1 + bytes[6] % 7;
                bytes[..8].copy_from_slice(&[b'h', b'g', b'c', b't', 1, 0, kind, 0]);
                let length = body_bytes(kind).unwrap_or(0) as u32;
                bytes[8..12].copy_from_slice(&length.to_le_bytes());
            }
            let mut side = if dialled {
                Handshake::dial(identity(2), Rank(0), [1; 32])
            } else {
                Handshake::accept(identity(0), [2; 32])
            };
            let end = feed(&mut side, &bytes);
            prop_assert!(matches!(end, Ok(Progress::Wait) | Err(_)), "{:?}", end);
        }
    }
}
