//! Who may speak: mutual challenge and response over a fresh control connection. Sans-IO.
//!
//! ```text
//! agent (client)                                    coordinator (server)
//!                     ◄──   nonce S, run id          greeting
//!   proof   nonce C, node, HMAC(client, …)   ──►     (checked before anything else is looked at)
//!                     ◄──   HMAC(server, …)          welcome
//! ```
//!
//! - Both proofs cover role, protocol version, both nonces, run id and node name. The nonces are
//!   fresh, so a recording proves nothing; the role differs, so a proof cannot be reflected.
//! - The key is derived from token and run id; the token itself never crosses the wire.
//! - Every message has the fixed size of its kind, at most [`MAX_MESSAGE`] bytes. Names are opaque
//!   bytes until the proof over them is verified.
//! - The coordinator proves itself only to an agent that has proved itself. A stranger hears no more
//!   than "version" or "token".
//!
//! The shell reads exactly [`Handshake::wanted`] bytes at a time, so that what follows the handshake
//! stays in the connection, gives them to [`Handshake::receive`] and writes [`Handshake::output`],
//! also after an error. It sets the deadline.

use std::fmt;

use hgct_core::ids::{NodeId, RunId};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::message::PROTOCOL;
use crate::{Error, Result};

/// Most bytes of one handshake message, prefix included.
pub const MAX_MESSAGE: usize = 512;

const MAGIC: [u8; 8] = *b"hgct-ctl";
const PREFIX: usize = 16;
const NONCE: usize = 32;
const MAC: usize = 32;
/// A name's length in one byte, then its bytes, then zeros.
const NAME: usize = 1 + 128;

const GREETING: u32 = 1;
const PROOF: u32 = 2;
const WELCOME: u32 = 3;
const REFUSE: u32 = 4;

const REFUSE_VERSION: u32 = 1;
const REFUSE_TOKEN: u32 = 2;

const fn body_bytes(kind: u32) -> Option<usize> {
    match kind {
        GREETING => Some(NONCE + NAME),
        PROOF => Some(NONCE + NAME + MAC),
        WELCOME => Some(MAC),
        REFUSE => Some(4),
        _ => None,
    }
}

const _: () = assert!(PREFIX + NONCE + NAME + MAC <= MAX_MESSAGE);

/// The secret of a run, as it lies in the token file. Never printed, never sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Fewest characters of a token.
    pub const MIN_LEN: usize = 32;
    const MAX_LEN: usize = 1024;
    const ALLOWED: &'static str = "32 to 1024 letters, digits and other printable characters without spaces";

    /// Parses the text of a token file; white space around the token is cut off. That the file has
    /// mode 0600 is for its reader to check.
    pub fn parse(text: &str) -> Result<Self> {
        let token = text.trim();
        let bad = |found: String| Err(Error::BadToken { found, allowed: Self::ALLOWED });
        if let Some(at) = token.bytes().position(|byte| !byte.is_ascii_graphic()) {
            return bad(format!("has a character at position {at} that is not printable ASCII"));
        }
        if token.len() < Self::MIN_LEN || token.len() > Self::MAX_LEN {
            return bad(format!("has {} characters", token.len()));
        }
        Ok(Self(token.into()))
    }

    /// A new token from random bytes of the operating system.
    pub fn from_random(bytes: &[u8; 32]) -> Self {
        Self(hex(bytes))
    }

    /// The text for a token file, with a final newline.
    pub fn to_file(&self) -> String {
        format!("{}\n", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// A key of one run and one purpose. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of control connections.
    pub fn control(token: &Token, run: &RunId) -> Self {
        Self::derive(token, b"control", run.as_str().as_bytes())
    }

    /// The key of data connections between workers.
    pub fn data(token: &Token, run: &RunId) -> Self {
        Self::derive(token, b"data", run.as_str().as_bytes())
    }

    /// As 64 hex digits, for [`crate::message::ToWorker::Attach`].
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// HMAC-SHA256 under the token. The purpose ends in a zero byte, so no two pairs read the same.
    fn derive(token: &Token, purpose: &[u8], run: &[u8]) -> Self {
        let mac = mac_over(token.0.as_bytes(), &[b"hgct run key ", purpose, b"\0", run]);
        Self(mac.finalize().into_bytes().into())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

/// Whom the connection leads to, proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The run; its agents learn it here.
    pub run: RunId,
    /// The agent's node.
    pub node: NodeId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Client: waits for greeting, then welcome.
    Greeting,
    Welcome,
    /// Server: waits for the proof.
    Proof,
    /// Ended, well or not.
    Over,
}

/// One side of one handshake.
pub struct Handshake {
    token: Token,
    state: State,
    server_nonce: [u8; NONCE],
    client_nonce: [u8; NONCE],
    run: [u8; NAME],
    node: [u8; NAME],
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Handshake {
    /// The coordinator's side. `nonce` is fresh from the operating system for each connection.
    pub fn server(token: Token, run: &RunId, nonce: [u8; NONCE]) -> Self {
        let mut this = Self::new(token, State::Proof);
        this.server_nonce = nonce;
        this.run = pad(run.as_str());
        let body = [this.server_nonce.as_slice(), &this.run].concat();
        this.put(GREETING, &body);
        this
    }

    /// The agent's side. `nonce` is fresh from the operating system for each connection.
    pub fn client(token: Token, node: &NodeId, nonce: [u8; NONCE]) -> Self {
        let mut this = Self::new(token, State::Greeting);
        this.client_nonce = nonce;
        this.node = pad(node.as_str());
        this
    }

    fn new(token: Token, state: State) -> Self {
        Self {
            token,
            state,
            server_nonce: [0; NONCE],
            client_nonce: [0; NONCE],
            run: [0; NAME],
            node: [0; NAME],
            input: Vec::new(),
            output: Vec::new(),
        }
    }

    /// How many bytes to read now, never beyond the handshake; 0: none, it is over.
    pub fn wanted(&self) -> usize {
        if self.state == State::Over {
            return 0;
        }
        let whole = match self.input.get(12..PREFIX) {
            Some(&[a, b, c, d]) => PREFIX + body_bytes(u32::from_le_bytes([a, b, c, d])).unwrap_or(0),
            _ => PREFIX,
        };
        whole.saturating_sub(self.input.len())
    }

    /// Takes the bytes to write. After an error there may be a refusal in it: write it, then close.
    pub fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes bytes that were read, at most [`Self::wanted`] of them (more are an error). Gives the
    /// peer once both sides are proved; write [`Self::output`] then too.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Option<Peer>> {
        let result = self.step(bytes);
        if let Err(error) = &result {
            self.state = State::Over;
            self.input = Vec::new();
            self.refuse(error);
        }
        result
    }

    fn step(&mut self, bytes: &[u8]) -> Result<Option<Peer>> {
        if bytes.len() > self.wanted() {
            return Err(not_handshake(format!("{} bytes where {} are wanted", bytes.len(), self.wanted())));
        }
        self.input.extend_from_slice(bytes);
        if self.input.len() < PREFIX {
            return Ok(None);
        }
        let kind = self.check_prefix()?;
        if self.wanted() > 0 {
            return Ok(None);
        }
        let message = std::mem::take(&mut self.input);
        self.take(kind, &message[PREFIX..])
    }

    fn take(&mut self, kind: u32, body: &[u8]) -> Result<Option<Peer>> {
        match (self.state, kind) {
            (State::Greeting, GREETING) => {
                self.server_nonce.copy_from_slice(&body[..NONCE]);
                self.run.copy_from_slice(&body[NONCE..]);
                let proof = self.proof(b"client")?.finalize().into_bytes();
                let body = [self.client_nonce.as_slice(), &self.node, &proof].concat();
                self.put(PROOF, &body);
                self.state = State::Welcome;
                Ok(None)
            }
            (State::Proof, PROOF) => {
                self.client_nonce.copy_from_slice(&body[..NONCE]);
                self.node.copy_from_slice(&body[NONCE..NONCE + NAME]);
                self.proof(b"client")?.verify_slice(&body[NONCE + NAME..]).map_err(|_| Error::Token)?;
                let peer = self.peer()?;
                let welcome = self.proof(b"server")?.finalize().into_bytes();
                self.put(WELCOME, &welcome);
                self.state = State::Over;
                Ok(Some(peer))
            }
            (State::Welcome, WELCOME) => {
                self.proof(b"server")?.verify_slice(body).map_err(|_| Error::Token)?;
                self.state = State::Over;
                self.peer().map(Some)
            }
            (State::Greeting | State::Welcome | State::Proof, REFUSE) => {
                let reason = if body == REFUSE_TOKEN.to_le_bytes() {
                    "the token is not the one of its run: give both sides the same token file"
                } else {
                    "it speaks another version of the protocol: install the same hgct on both"
                };
                Err(Error::Refused { reason })
            }
            (state, kind) => Err(not_handshake(format!("a message of kind {kind} in state {state:?}"))),
        }
    }

    /// Magic, version and kind, before anything else is looked at.
    fn check_prefix(&self) -> Result<u32> {
        if self.input[..8] != MAGIC {
            return Err(not_handshake("bytes that are not this protocol".into()));
        }
        let number = |at: usize| {
            u32::from_le_bytes([self.input[at], self.input[at + 1], self.input[at + 2], self.input[at + 3]])
        };
        let (version, kind) = (number(8), number(12));
        // A refusal is read whatever version it has: it says that versions differ.
        if version != PROTOCOL && kind != REFUSE {
            return Err(Error::Protocol { theirs: version, ours: PROTOCOL });
        }
        let expected = match self.state {
            State::Greeting => GREETING,
            State::Welcome => WELCOME,
            _ => PROOF,
        };
        if kind != expected && kind != REFUSE {
            return Err(not_handshake(format!("a message of kind {kind} where kind {expected} comes next")));
        }
        Ok(kind)
    }

    /// The MAC over everything that both sides know. All parts have fixed sizes, both roles the same.
    fn proof(&self, role: &'static [u8]) -> Result<Hmac<Sha256>> {
        let key = Key::derive(&self.token, b"control", name_bytes(&self.run)?);
        let version = PROTOCOL.to_le_bytes();
        let parts: [&[u8]; 7] = [
            b"hgct control proof\0",
            role,
            &version,
            &self.server_nonce,
            &self.client_nonce,
            &self.run,
            &self.node,
        ];
        Ok(mac_over(&key.0, &parts))
    }

    /// Both names; called only after the proof over them.
    fn peer(&self) -> Result<Peer> {
        let text = |name| {
            let bytes: &[u8] = name_bytes(name)?;
            std::str::from_utf8(bytes).map_err(|_| not_handshake("a name that is not text".into()))
        };
        let bad = |error: hgct_core::Error| not_handshake(error.to_string());
        Ok(Peer {
            run: RunId::new(text(&self.run)?).map_err(bad)?,
            node: NodeId::new(text(&self.node)?).map_err(bad)?,
        })
    }

    fn refuse(&mut self, error: &Error) {
        let code = match error {
            Error::Protocol { .. } => REFUSE_VERSION,
            Error::Token => REFUSE_TOKEN,
            _ => return,
        };
        self.put(REFUSE, &code.to_le_bytes());
    }

    fn put(&mut self, kind: u32, body: &[u8]) {
        self.output.extend_from_slice(&MAGIC);
        self.output.extend_from_slice(&PROTOCOL.to_le_bytes());
        self.output.extend_from_slice(&kind.to_le_bytes());
        self.output.extend_from_slice(body);
    }
}

fn not_handshake(found: String) -> Error {
    Error::NotHandshake { found }
}

/// Names have at most 128 bytes by their types.
fn pad(name: &str) -> [u8; NAME] {
    let mut field = [0; NAME];
    let length = name.len().min(NAME - 1);
    field[0] = length as u8;
    field[1..=length].copy_from_slice(&name.as_bytes()[..length]);
    field
}

fn name_bytes(field: &[u8; NAME]) -> Result<&[u8]> {
    let length = usize::from(field[0]);
    match field.get(1..=length) {
        Some(name) if field[1 + length..].iter().all(|byte| *byte == 0) => Ok(name),
        _ => Err(not_handshake("a name of a length that names do not have".into())),
    }
}

fn mac_over(key: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = match Hmac::<Sha256>::new_from_slice(key) {
        Ok(mac) => mac,
        Err(error) => unreachable!("HMAC takes keys of any length: {error}"),
    };
    for part in parts {
        mac.update(part);
    }
    mac
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
