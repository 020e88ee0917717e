-- Made from llm_orm/records.py by: python -m llm_orm_schema.ddl

CREATE TABLE "llm_chat" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "model" TEXT,
    "provider" TEXT,
    "instructions" TEXT,
    "metadata" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL
);

CREATE INDEX "llm_chat_created_at" ON "llm_chat" ("created_at");

CREATE TABLE "llm_message" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "chat_id" TEXT NOT NULL,
    "position" INTEGER NOT NULL,
    "role" TEXT NOT NULL,
    "status" TEXT NOT NULL,
    "content" TEXT,
    "content_raw" TEXT,
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
    "updated_at" TIMESTAMPTZ NOT NULL,
    "parked_at" TIMESTAMPTZ,
    "cancelled_at" TIMESTAMPTZ,
    "owner" TEXT,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE,
    CONSTRAINT "llm_message_role_check" CHECK (role IN ('user', 'assistant', 'system', 'tool')),
    CONSTRAINT "llm_message_status_check" CHECK (status IN ('pending', 'completed', 'incomplete', 'failed'))
);

CREATE UNIQUE INDEX "llm_message_chat_id_position" ON "llm_message" ("chat_id", "position");

CREATE UNIQUE INDEX "llm_message_chat_id_request_key" ON "llm_message" ("chat_id", "request_key");

CREATE INDEX "llm_message_created_at" ON "llm_message" ("created_at");

CREATE UNIQUE INDEX "llm_message_one_pending" ON "llm_message" ("chat_id") WHERE status = 'pending';

CREATE TABLE "llm_tool_call" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "chat_id" TEXT NOT NULL,
    "message_id" TEXT,
    "turn_id" TEXT NOT NULL,
    "round" INTEGER NOT NULL,
    "position" INTEGER NOT NULL,
    "tool_call_id" TEXT NOT NULL,
    "name" TEXT NOT NULL,
    "arguments" TEXT NOT NULL,
    "thought" TEXT,
    "thought_signature" TEXT,
    "result" TEXT,
    "status" TEXT NOT NULL,
    "approval" TEXT,
    "error" TEXT,
    "duration_ms" INTEGER,
    "metadata" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "finished_at" TIMESTAMPTZ,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE,
    FOREIGN KEY ("message_id") REFERENCES "llm_message" ("id") ON DELETE SET NULL,
    CONSTRAINT "llm_tool_call_status_check" CHECK (status IN ('pending', 'running', 'completed', 'failed', 'rejected')),
    CONSTRAINT "llm_tool_call_approval_check" CHECK (approval IN ('required', 'approved', 'denied'))
);

CREATE UNIQUE INDEX "llm_tool_call_message_id_tool_call_id" ON "llm_tool_call" ("message_id", "tool_call_id");

CREATE INDEX "llm_tool_call_chat_id_turn_id" ON "llm_tool_call" ("chat_id", "turn_id");

CREATE INDEX "llm_tool_call_created_at" ON "llm_tool_call" ("created_at");

CREATE TABLE "llm_request" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "chat_id" TEXT,
    "message_id" TEXT,
    "turn_id" TEXT,
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
    "streamed" INTEGER NOT NULL,
    "input_tokens" INTEGER NOT NULL,
    "output_tokens" INTEGER NOT NULL,
    "cached_tokens" INTEGER NOT NULL,
    "cache_write_tokens" INTEGER NOT NULL,
    "thinking_tokens" INTEGER NOT NULL,
    "usage_estimated" INTEGER NOT NULL,
    "cost" DECIMAL(20, 12),
    "correction_rounds" INTEGER,
    "provider_request_id" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE SET NULL,
    FOREIGN KEY ("message_id") REFERENCES "llm_message" ("id") ON DELETE SET NULL,
    CONSTRAINT "llm_request_source_check" CHECK (source IN ('chat', 'response', 'run'))
);

CREATE INDEX "llm_request_message_id" ON "llm_request" ("message_id");

CREATE INDEX "llm_request_chat_id_created_at" ON "llm_request" ("chat_id", "created_at");

CREATE INDEX "llm_request_created_at" ON "llm_request" ("created_at");

CREATE TABLE "llm_agent_session" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "agent_class" TEXT NOT NULL,
    "chat_id" TEXT NOT NULL,
    "metadata" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE
);

CREATE UNIQUE INDEX "llm_agent_session_chat_id" ON "llm_agent_session" ("chat_id");

CREATE INDEX "llm_agent_session_agent_class" ON "llm_agent_session" ("agent_class");

CREATE INDEX "llm_agent_session_created_at" ON "llm_agent_session" ("created_at");

CREATE TABLE "llm_attachment" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "message_id" TEXT NOT NULL,
    "position" INTEGER NOT NULL,
    "media_type" TEXT NOT NULL,
    "filename" TEXT,
    "size" INTEGER NOT NULL,
    "sha256" TEXT NOT NULL,
    "content" BLOB,
    "url" TEXT,
    FOREIGN KEY ("message_id") REFERENCES "llm_message" ("id") ON DELETE CASCADE
);

CREATE UNIQUE INDEX "llm_attachment_message_id_position" ON "llm_attachment" ("message_id", "position");
