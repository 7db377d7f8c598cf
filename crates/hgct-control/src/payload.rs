//! Payloads in an event log: their length is kept, their bytes are not. No decision looks at them.

use serde::de::Error as _;
use serde::{Deserialize as _, Deserializer, Serializer};

use crate::message::MAX_CHUNK;

pub(crate) fn serialize<S: Serializer>(payload: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(payload.len() as u64)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let length = u64::deserialize(deserializer)?;
    match usize::try_from(length) {
        Ok(length) if length <= MAX_CHUNK => Ok(vec![0; length]),
        _ => Err(D::Error::custom(format!("a payload of {length} bytes, at most {MAX_CHUNK} are allowed"))),
    }
}
