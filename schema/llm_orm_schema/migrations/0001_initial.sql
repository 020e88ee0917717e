CREATE TABLE "{chat}" (
    "id" {uuid} NOT NULL PRIMARY KEY,
    "model" TEXT,
    "provider" TEXT,
    "instructions" TEXT,
    "metadata" {json},
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL{chat_columns}
);

CREATE INDEX "{chat}_created_at" ON "{chat}" ("created_at");

CREATE TABLE "{message}" (
    "id" {uuid} NOT NULL PRIMARY KEY,
    "chat_id" {uuid} NOT NULL REFERENCES "{chat}" ("id") ON DELETE CASCADE,
    "position" INTEGER NOT NULL,
    "role" TEXT NOT NULL,
    "status" TEXT NOT NULL,
    "content" TEXT,
    "content_raw" {json},
    "thinking_text" TEXT,
    "thinking_signature" TEXT,
    "thinking_tokens" INTEGER,
    "input_tokens" INTEGER,
    "output_tokens" INTEGER,
    "cached_tokens" INTEGER,
    "model_id" TEXT,
    "provider" TEXT,
    "request_key" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL{message_columns},
    CONSTRAINT "{message}_role_check" CHECK (role IN ('user', 'assistant', 'system', 'tool')),
    CONSTRAINT "{message}_status_check" CHECK (status IN ('pending', 'completed', 'incomplete', 'failed'))
);

CREATE UNIQUE INDEX "{message}_chat_id_position" ON "{message}" ("chat_id", "position");

CREATE UNIQUE INDEX "{message}_chat_id_request_key" ON "{message}" ("chat_id", "request_key");

CREATE INDEX "{message}_created_at" ON "{message}" ("created_at");

CREATE UNIQUE INDEX "{message}_one_pending" ON "{message}" ("chat_id") WHERE status = 'pending';

CREATE TABLE "{tool_call}" (
    "id" {uuid} NOT NULL PRIMARY KEY,
    "chat_id" {uuid} NOT NULL REFERENCES "{chat}" ("id") ON DELETE CASCADE,
    "message_id" {uuid} REFERENCES "{message}" ("id") ON DELETE SET NULL,
    "turn_id" {uuid} NOT NULL,
    "round" INTEGER NOT NULL,
    "position" INTEGER NOT NULL,
    "tool_call_id" TEXT NOT NULL,
    "name" TEXT NOT NULL,
    "arguments" TEXT NOT NULL,
    "thought" TEXT,
    "thought_signature" TEXT,
    "result" TEXT,
    "status" TEXT NOT NULL,
    "error" TEXT,
    "duration_ms" INTEGER,
    "metadata" {json},
    "created_at" TIMESTAMPTZ NOT NULL,
    "finished_at" TIMESTAMPTZ{tool_call_columns},
    CONSTRAINT "{tool_call}_status_check"
        CHECK (status IN ('pending', 'running', 'completed', 'failed', 'rejected'))
);

CREATE UNIQUE INDEX "{tool_call}_message_id_tool_call_id" ON "{tool_call}" ("message_id", "tool_call_id");

CREATE INDEX "{tool_call}_chat_id_turn_id" ON "{tool_call}" ("chat_id", "turn_id");

CREATE INDEX "{tool_call}_created_at" ON "{tool_call}" ("created_at");

CREATE TABLE "{request}" (
    "id" {uuid} NOT NULL PRIMARY KEY,
    "chat_id" {uuid} REFERENCES "{chat}" ("id") ON DELETE SET NULL,
    "message_id" {uuid} REFERENCES "{message}" ("id") ON DELETE SET NULL,
    "turn_id" {uuid},
    "source" TEXT NOT NULL,
    "round" INTEGER NOT NULL,
    "attempt" INTEGER NOT NULL,
    "provider" TEXT NOT NULL,
    "model" TEXT NOT NULL,
    "status_code" INTEGER NOT NULL,
    "error" TEXT,
    "error_message" TEXT,
    "finish_reason" TEXT,
    "duration_ms" INTEGER NOT NULL,
    "first_token_ms" INTEGER,
    "streamed" {boolean} NOT NULL,
    "input_tokens" INTEGER NOT NULL,
    "output_tokens" INTEGER NOT NULL,
    "cached_tokens" INTEGER NOT NULL,
    "cache_write_tokens" INTEGER NOT NULL,
    "thinking_tokens" INTEGER NOT NULL,
    "usage_estimated" {boolean} NOT NULL,
    "cost" {decimal}(20, 12),
    "correction_rounds" INTEGER,
    "provider_request_id" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL{request_columns},
    CONSTRAINT "{request}_source_check" CHECK (source IN ('chat', 'response', 'run'))
);

CREATE INDEX "{request}_message_id" ON "{request}" ("message_id");

CREATE INDEX "{request}_chat_id_created_at" ON "{request}" ("chat_id", "created_at");

CREATE INDEX "{request}_created_at" ON "{request}" ("created_at");

CREATE TABLE "{agent_session}" (
    "id" {uuid} NOT NULL PRIMARY KEY,
    "agent_class" TEXT NOT NULL,
    "chat_id" {uuid} NOT NULL REFERENCES "{chat}" ("id") ON DELETE CASCADE,
    "metadata" {json},
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL{agent_session_columns}
);

CREATE UNIQUE INDEX "{agent_session}_chat_id" ON "{agent_session}" ("chat_id");

CREATE INDEX "{agent_session}_agent_class" ON "{agent_session}" ("agent_class");

CREATE INDEX "{agent_session}_created_at" ON "{agent_session}" ("created_at");

CREATE TABLE "{attachment}" (
    "id" {uuid} NOT NULL PRIMARY KEY,
    "message_id" {uuid} NOT NULL REFERENCES "{message}" ("id") ON DELETE CASCADE,
    "position" INTEGER NOT NULL,
    "media_type" TEXT NOT NULL,
    "filename" TEXT,
    "size" {bigint} NOT NULL,
    "sha256" TEXT NOT NULL,
    "content" {blob},
    "url" TEXT{attachment_columns}
);

CREATE UNIQUE INDEX "{attachment}_message_id_position" ON "{attachment}" ("message_id", "position");
