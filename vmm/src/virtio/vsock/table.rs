//! The table of connections: bounded, and indexed both by ports and by a token that never names a later connection.

use std::collections::HashMap;

use super::connection::{Connection, Key};

/// Most connections at a time, greetings and drains included.
pub const MAX_CONNECTIONS: usize = 1024;

/// Names one connection: a slot and how often it was filled before, so that an event which arrives late finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    slot: u32,
    generation: u32,
}

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        u64::from(token.generation) << 32 | u64::from(token.slot)
    }
}

impl From<u64> for Token {
    fn from(value: u64) -> Self {
        Self {
            slot: value as u32,
            generation: (value >> 32) as u32,
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    scheduled: bool,
    connection: Option<Box<Connection>>,
}

/// The table.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_key: HashMap<Key, Token>,
}

impl Table {
    /// Whether no connection can be added.
    pub fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() >= MAX_CONNECTIONS
    }

    /// Adds a connection; gives it back if the table is full.
    pub fn insert(&mut self, connection: Connection) -> Result<Token, Connection> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < MAX_CONNECTIONS => {
                self.slots.push(Slot::default());
                (self.slots.len() - 1) as u32
            }
            None => return Err(connection),
        };
        let entry = &mut self.slots[slot as usize];
        entry.connection = Some(Box::new(connection));
        entry.scheduled = false;
        Ok(Token {
            slot,
            generation: entry.generation,
        })
    }

    /// Takes a connection out.
    pub fn remove(&mut self, token: Token) -> Option<Connection> {
        let entry = self.slots.get_mut(token.slot as usize)?;
        if entry.generation != token.generation {
            return None;
        }
        let connection = entry.connection.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(token.slot);
        self.unlink(connection.key(), token);
        Some(*connection)
    }

    /// The connection of a token.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut Connection> {
        let entry = self.slots.get_mut(token.slot as usize)?;
        if entry.generation != token.generation {
            return None;
        }
        entry.connection.as_deref_mut()
    }

    /// The connection that the guest knows by these ports.
    pub fn find(&self, key: Key) -> Option<Token> {
        self.by_key.get(&key).copied()
    }

    /// Makes a connection known by its ports.
    pub fn link(&mut self, key: Key, token: Token) {
        self.by_key.insert(key, token);
    }

    /// Makes a connection unknown to the guest: it may use the ports for a new one.
    pub fn unlink(&mut self, key: Key, token: Token) {
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
    }

    /// Notes that a connection is in the queue of those with something to say. False if it was already.
    pub fn schedule(&mut self, token: Token) -> bool {
        match self.slots.get_mut(token.slot as usize) {
            Some(slot) if slot.generation == token.generation && slot.connection.is_some() => {
                !std::mem::replace(&mut slot.scheduled, true)
            }
            _ => false,
        }
    }

    /// The reverse of [`Table::schedule`].
    pub fn unschedule(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(token.slot as usize)
            && slot.generation == token.generation
        {
            slot.scheduled = false;
        }
    }
}
