//! Frames: how messages lie in a byte stream.
//!
//! ```text
//! u32le header_len | u32le payload_len | header: JSON of Envelope<M> | payload: raw bytes
//! ```
//!
//! Lengths are looked at before anything is kept: a header has at most [`MAX_HEADER`] bytes, a
//! payload at most [`MAX_CHUNK`]. Memory grows with the bytes that really came, never with what a
//! prefix announces. Before authentication there are no frames at all, only the fixed-size messages
//! of [`crate::auth`].

use std::marker::PhantomData;

use hgct_core::ids::{Generation, RunId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::message::{Envelope, MAX_CHUNK, PROTOCOL};
use crate::{Error, Result};

/// Most header bytes of one frame (a plan of a thousand ranks fits).
pub const MAX_HEADER: usize = 8 << 20;

/// Bytes before the header.
pub const PREFIX_BYTES: usize = 8;

/// Prefix and header of a frame; `payload_len` raw bytes follow on the wire. Lets a payload be
/// written without a copy.
pub fn encode_header<M: Serialize>(envelope: &Envelope<M>, payload_len: usize) -> Result<Vec<u8>> {
    let mut frame = vec![0; PREFIX_BYTES];
    serde_json::to_writer(&mut frame, envelope)
        .map_err(|error| Error::Header { message: error.to_string() })?;
    let header_len = check("header", frame.len() - PREFIX_BYTES, MAX_HEADER)?;
    let payload_len = check("payload", payload_len, MAX_CHUNK)?;
    frame[..4].copy_from_slice(&header_len.to_le_bytes());
    frame[4..PREFIX_BYTES].copy_from_slice(&payload_len.to_le_bytes());
    Ok(frame)
}

/// A whole frame.
pub fn encode<M: Serialize>(envelope: &Envelope<M>, payload: &[u8]) -> Result<Vec<u8>> {
    let mut frame = encode_header(envelope, payload.len())?;
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Cuts a byte stream into messages. After an error the stream has lost its frame: the same error
/// comes again, and the connection can only be closed.
#[derive(Debug)]
pub struct Decoder<M> {
    buffer: Vec<u8>,
    /// Bytes of the buffer that were handed out.
    taken: usize,
    failed: Option<Error>,
    message: PhantomData<fn() -> M>,
}

impl<M: DeserializeOwned> Decoder<M> {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self { buffer: Vec::new(), taken: 0, failed: None, message: PhantomData }
    }

    /// Takes bytes that were read. Take all messages out with [`Self::next_frame`] before the next
    /// read: that bounds the buffer to one frame and one read.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message with its payload; `None` until more bytes come.
    pub fn next_frame(&mut self) -> Result<Option<(Envelope<M>, Vec<u8>)>> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.cut();
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.buffer = Vec::new();
            self.taken = 0;
        }
        result
    }

    /// Whether bytes of an unfinished frame are held: an end of the stream now is a torn frame.
    pub fn is_inside_frame(&self) -> bool {
        self.buffer.len() > self.taken
    }

    fn cut(&mut self) -> Result<Option<(Envelope<M>, Vec<u8>)>> {
        let bytes = &self.buffer[self.taken..];
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let [h0, h1, h2, h3, p0, p1, p2, p3] = *prefix;
        let header_len = u32::from_le_bytes([h0, h1, h2, h3]) as usize;
        let payload_len = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
        check("header", header_len, MAX_HEADER)?;
        check("payload", payload_len, MAX_CHUNK)?;
        let Some(body) = rest.get(..header_len + payload_len) else { return Ok(None) };
        let (header, payload) = body.split_at(header_len);
        let envelope = parse(header)?;
        let payload = payload.to_vec();
        self.taken += PREFIX_BYTES + header_len + payload_len;
        if self.taken == self.buffer.len() {
            self.taken = 0;
            self.buffer.clear();
            // A plan must not hold its memory for the rest of the run.
            self.buffer.shrink_to(2 * MAX_CHUNK);
        }
        Ok(Some((envelope, payload)))
    }
}

impl<M: DeserializeOwned> Default for Decoder<M> {
    fn default() -> Self {
        Self::new()
    }
}

/// Numbers the messages of one connection.
#[derive(Debug, Clone)]
pub struct Outbox {
    run: RunId,
    next: u64,
}

impl Outbox {
    /// The first message gets number 0.
    pub fn new(run: RunId) -> Self {
        Self { run, next: 0 }
    }

    /// Puts a message into its envelope.
    pub fn seal<M>(&mut self, generation: Generation, message: M) -> Envelope<M> {
        let sequence = self.next;
        self.next += 1;
        Envelope { protocol: PROTOCOL, run: self.run.clone(), generation, sequence, message }
    }
}

/// Checks the envelopes of one connection: the run, and that no message is missing or comes twice.
#[derive(Debug, Clone)]
pub struct Inbox {
    run: RunId,
    next: u64,
}

impl Inbox {
    /// Expects number 0 first.
    pub fn new(run: RunId) -> Self {
        Self { run, next: 0 }
    }

    /// Admits the next envelope. An error is the peer's fault: close the connection.
    pub fn admit<M>(&mut self, envelope: &Envelope<M>) -> Result<()> {
        if envelope.protocol != PROTOCOL {
            return Err(Error::Protocol { theirs: envelope.protocol, ours: PROTOCOL });
        }
        if envelope.run != self.run {
            return Err(Error::Run { theirs: envelope.run.to_string(), ours: self.run.clone() });
        }
        if envelope.sequence != self.next {
            return Err(Error::Sequence { found: envelope.sequence, expected: self.next });
        }
        self.next += 1;
        Ok(())
    }
}

/// Rejects what belongs to an older generation than the receiver's. The caller drops the message
/// and goes on: late messages are no fault.
pub fn fence(theirs: Generation, ours: Generation) -> Result<()> {
    if theirs < ours { Err(Error::Fenced { theirs, ours }) } else { Ok(()) }
}

fn check(part: &'static str, bytes: usize, limit: usize) -> Result<u32> {
    match u32::try_from(bytes) {
        Ok(len) if bytes <= limit => Ok(len),
        _ => Err(Error::TooLong { part, bytes: bytes as u64, limit: limit as u64 }),
    }
}

/// The version is asked for apart when the message does not parse: a newer protocol has messages
/// that this one cannot read.
fn parse<M: DeserializeOwned>(header: &[u8]) -> Result<Envelope<M>> {
    #[derive(Deserialize)]
    struct Version {
        protocol: u32,
    }
    let wrong = |theirs| Err(Error::Protocol { theirs, ours: PROTOCOL });
    match serde_json::from_slice::<Envelope<M>>(header) {
        Ok(envelope) if envelope.protocol == PROTOCOL => Ok(envelope),
        Ok(envelope) => wrong(envelope.protocol),
        Err(error) => match serde_json::from_slice::<Version>(header) {
            Ok(Version { protocol }) if protocol != PROTOCOL => wrong(protocol),
            _ => Err(Error::Header { message: error.to_string() }),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::{FromWorker, StepReport, ToAgent};

    fn envelope<M>(sequence: u64, message: M) -> Envelope<M> {
        let run = RunId::new("run-1").unwrap();
        Envelope {
            protocol: PROTOCOL,
            run,
            generation: Generation { epoch: 1, sequence: 2 },
            sequence,
            message,
        }
    }

    fn shutdown(sequence: u64) -> Envelope<ToAgent> {
        envelope(sequence, ToAgent::Shutdown { reason: "done".into() })
    }

    type Frames = Vec<(Envelope<ToAgent>, Vec<u8>)>;

    fn stream() -> (Vec<u8>, Frames) {
        let frames: Frames = [0, 1, 700, 0]
            .into_iter()
            .zip(0..)
            .map(|(length, sequence)| (shutdown(sequence), vec![7; length]))
            .collect();
        (frames.iter().flat_map(|(e, p)| encode(e, p).unwrap()).collect(), frames)
    }

    #[test]
    fn the_layout_is_pinned() {
        let frame = encode(&shutdown(5), b"xyz").unwrap();
        let header = r#"{"protocol":1,"run":"run-1","generation":{"epoch":1,"sequence":2},"sequence":5,"message":{"type":"shutdown","reason":"done"}}"#;
        assert_eq!(frame[..8], [header.len() as u8, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(std::str::from_utf8(&frame[8..]).unwrap(), format!("{header}xyz"));
    }

    #[test]
    fn losses_that_are_not_finite_cross_the_wire() {
        let report = StepReport {
            step: 3,
            loss_sum: f64::NAN,
            num_tokens: 1,
            grad_norm: f64::NEG_INFINITY,
            learning_rate: 1e-3,
            skipped: true,
            step_ns: 0,
            compute_ns: 0,
            exchange_ns: 0,
            exposed_communication_ns: 0,
            compute_cpu_ns: 0,
            memory_bytes: 0,
        };
        let mut decoder = Decoder::<FromWorker>::new();
        decoder.push(&encode(&envelope(0, FromWorker::StepDone(report)), b"").unwrap());
        let Some((Envelope { message: FromWorker::StepDone(back), .. }, _)) = decoder.next_frame().unwrap()
        else {
            panic!("not a step report")
        };
        assert!(back.loss_sum.is_nan());
        assert_eq!((back.grad_norm, back.learning_rate), (f64::NEG_INFINITY, 1e-3));
    }

    #[test]
    fn lengths_are_refused_before_the_bytes_come() {
        for (header, payload, part) in
            [(MAX_HEADER + 1, 0, "header"), (1, MAX_CHUNK + 1, "payload"), (u32::MAX as usize, 0, "header")]
        {
            let mut decoder = Decoder::<ToAgent>::new();
            decoder.push(&(header as u32).to_le_bytes());
            decoder.push(&(payload as u32).to_le_bytes());
            let error = decoder.next_frame().unwrap_err();
            assert!(matches!(error, Error::TooLong { part: p, .. } if p == part), "{error}");
            decoder.push(&[0; 100]);
            assert_eq!(decoder.next_frame().unwrap_err(), error, "a lost stream stays lost");
            assert!(decoder.buffer.is_empty());
        }
        assert!(encode(&shutdown(0), &vec![0; MAX_CHUNK + 1]).is_err());
    }

    #[test]
    fn another_protocol_is_named_even_when_its_messages_are_unknown() {
        for message in [r#"{"type":"shutdown","reason":""}"#, r#"{"type":"from-the-future"}"#] {
            let header = format!(
                r#"{{"protocol":9,"run":"r","generation":{{"epoch":0,"sequence":0}},"sequence":0,"message":{message}}}"#
            );
            let mut decoder = Decoder::<ToAgent>::new();
            decoder.push(&(header.len() as u32).to_le_bytes());
            decoder.push(&[0; 4]);
            decoder.push(header.as_bytes());
            assert_eq!(decoder.next_frame().unwrap_err(), Error::Protocol { theirs: 9, ours: PROTOCOL });
        }
    }

    #[test]
    fn a_connection_admits_its_own_messages_once_and_in_order() {
        let run = RunId::new("run-1").unwrap();
        let (mut outbox, mut inbox) = (Outbox::new(run.clone()), Inbox::new(run));
        let first = outbox.seal(Generation::default(), ());
        let second = outbox.seal(Generation::default(), ());
        assert_eq!(inbox.admit(&second), Err(Error::Sequence { found: 1, expected: 0 }));
        inbox.admit(&first).unwrap();
        assert_eq!(inbox.admit(&first), Err(Error::Sequence { found: 0, expected: 1 }));
        inbox.admit(&second).unwrap();
        let mut stranger = Outbox::new(RunId::new("run-2").unwrap()).seal(Generation::default(), ());
        stranger.sequence = 2;
        assert!(matches!(inbox.admit(&stranger), Err(Error::Run { .. })));
    }

    #[test]
    fn only_older_generations_are_fenced() {
        let ours = Generation { epoch: 2, sequence: 3 };
        assert!(fence(Generation { epoch: 1, sequence: 9 }, ours).is_err());
        assert!(fence(ours, ours).is_ok());
        assert!(fence(ours.next(), ours).is_ok());
    }

    proptest! {
        #[test]
        fn any_cut_of_the_stream_gives_the_same_messages(cuts in prop::collection::vec(1usize..300, 0..30)) {
            let (bytes, expected) = stream();
            let mut decoder = Decoder::<ToAgent>::new();
            let mut found = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                decoder.push(now);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    found.push(frame);
                }
                rest = later;
            }
            prop_assert_eq!(found, expected);
            prop_assert!(!decoder.is_inside_frame());
        }

        #[test]
        fn mutated_bytes_never_panic(at in 0usize..1200, value: u8, cut in 0usize..1200) {
            let (mut bytes, _) = stream();
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(bytes.len().min(cut.max(at + 1)));
            let mut decoder = Decoder::<ToAgent>::new();
            decoder.push(&bytes);
            for _ in 0..10 {
                let _ = decoder.next_frame();
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::<ToAgent>::new();
            for piece in bytes.chunks(7) {
                decoder.push(piece);
                while matches!(decoder.next_frame(), Ok(Some(_))) {}
            }
        }
    }
}
