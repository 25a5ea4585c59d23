"""Turns what a corpus lists into shards: conversion, units, encoding, publishing; knows no corpus by name."""
