//! `bulkhead check`: stub.
